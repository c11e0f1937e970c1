"""Models in other formats: Hugging Face folders and GGUF files, in and out, with proof."""
