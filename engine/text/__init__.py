"""Text in and out, free of torch: the tokenizer, the incremental detokeniser and the chat template."""
