"""What is wrong with the data, as far as their rows tell: without a model, or by the losses of a model's forward pass."""
