"""What a model is worth: perplexity, comparisons and figures."""
