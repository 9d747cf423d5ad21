"""Vision-language models as nnsight models: loading, prompt encoding, token geometry and hook names."""
