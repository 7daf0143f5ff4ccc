"""What is wrong with the data: what rows tell by themselves, and by the losses of a model's forward pass."""
