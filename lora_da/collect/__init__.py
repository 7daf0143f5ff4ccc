"""Statistics of the targeted layers: how the samples are run through the model, and what is summed meanwhile."""
