"""Settings for every test."""

from hypothesis import HealthCheck, settings

# Examples share two cores with rank groups: how long one takes says nothing about the code.
settings.register_profile("tpserve", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tpserve")
