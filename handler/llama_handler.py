"""The handler that TorchServe loads. Copied flat into archives: one class, absolute imports, no logic."""

from tpserve.handler import service, torchserve


class LlamaHandler:
    """Serves one model; TorchServe makes one instance a backend process."""

    def __init__(self) -> None:
        self._service: service.Service | None = None

    def initialize(self, context: torchserve.Context) -> None:
        """Starts the engine and returns when it can make tokens.

        Raises:
            ConfigError: model-config.yaml or the checkpoint cannot be served.
            EngineError: the rank group did not come up.
        """
        self._service = service.Service.start(context)

    def handle(self, data, context):  # type: ignore[no-untyped-def]  # TorchServe asks for the names `data, context`
        """Answers one call of TorchServe: one result a request, in order. Never raises for a request's fault."""
        assert self._service is not None, "TorchServe calls initialize first"
        return self._service.handle(data, context)
