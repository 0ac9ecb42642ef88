"""Triton's own client over HTTP."""

from __future__ import annotations

import numpy as np
import tritonclient.http as triton

from tests.clients.steps import KEY, URL, Steps


def main() -> None:
    steps = Steps("tritonclient")
    headers = {"Authorization": f"Bearer {KEY}"}
    client = triton.InferenceServerClient(URL.removeprefix("http://"), network_timeout=60.0)
    with steps.step("is_server_live, is_server_ready, is_model_ready"):
        assert client.is_server_live(headers=headers)
        assert client.is_server_ready(headers=headers)
        assert client.is_model_ready("ensemble", headers=headers)
        assert not client.is_model_ready("another", headers=headers)
    with steps.step("get_server_metadata") as step:
        step.found(", ".join(client.get_server_metadata(headers=headers)["extensions"]))
    with steps.step("get_model_metadata"):
        told = client.get_model_metadata("ensemble", headers=headers)
        assert {one["name"] for one in told["inputs"]} >= {"text_input", "max_tokens"}
    with steps.step("get_model_config"):
        client.get_model_config("ensemble", headers=headers)
    for binary in (False, True):
        with steps.step(f"infer, {'binary' if binary else 'JSON'} tensors, a batch of 2"):
            text = triton.InferInput("text_input", [2, 1], "BYTES")
            prompts = np.array([[b"Once upon a time"], [b"There was a king"]], dtype=object)
            text.set_data_from_numpy(prompts, binary_data=binary)
            limit = triton.InferInput("max_tokens", [2, 1], "INT32")
            limit.set_data_from_numpy(np.array([[20], [20]], dtype=np.int32), binary_data=binary)
            wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("text_output", "output_ids")]
            result = client.infer("ensemble", [text, limit], outputs=wanted, request_id="7", headers=headers)
            # Of JSON it makes str, of binary tensors bytes.
            texts = [
                value if isinstance(value, str) else value.decode() for value in result.as_numpy("text_output").ravel()
            ]
            assert len(texts) == 2
            assert all(texts)
            assert result.as_numpy("output_ids").shape[0] == 2
            assert result.get_response()["id"] == "7"
    with steps.step("async_infer"):
        pending = [client.async_infer("ensemble", [text, limit], headers=headers) for _ in range(1)]
        assert pending[0].get_result().as_numpy("text_output") is not None
    with steps.step("an error by its class"):
        bad = triton.InferInput("top_p", [1, 1], "FP32")
        bad.set_data_from_numpy(np.array([[3]], dtype=np.float32))
        one = triton.InferInput("text_input", [1, 1], "BYTES")
        one.set_data_from_numpy(prompts[:1])
        try:
            client.infer("ensemble", [one, bad], headers=headers)
        except triton.InferenceServerException as e:
            assert "top_p" in str(e)  # noqa: PT017
        else:
            raise AssertionError("top_p 3 was taken")
    client.close()
    steps.end()


main()
