"""OpenAI's protocol: chat and text completions, models, and vLLM's tokenize and detokenize."""
