"""The catalogue: published models, any Hugging Face config.json, hardware. No torch."""
