"""A checkpoint as a Hugging Face model folder: weights, config, tokenizer, card, hashes and the proof that it loads."""
