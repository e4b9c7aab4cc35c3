"""Model cards for ProCLIP checkpoints: what the Hub shows beside the weights."""
