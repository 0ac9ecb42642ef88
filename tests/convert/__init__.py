"""Tests of `tpserve.convert`."""
