"""Deploy: export, check on real inputs, and measure where the model will run."""
