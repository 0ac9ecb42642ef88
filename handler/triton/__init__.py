"""Triton's protocols: the generate extension and KServe v2's infer, with the names of TensorRT-LLM and others."""
