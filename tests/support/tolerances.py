"""How far two numbers may be apart, relative to their size, and why; what only one test needs is in its file."""

EXACT = 1e-10  # float64 against float64
FLOAT32 = 2e-5  # a float32 model and sums against the float64 oracle: 1e-7 times the depth and width of a tiny model
DEQUANTISED = 2e-5  # a quantised layer multiplies with its twin's very weight: the order of float32 sums is left
REORDERED = 1e-5  # float32 sums of the same tokens in another order
# The same documents in other batches: that rounding, and the inverse of the input covariance, of a condition number
# around 100, makes more of it.
REBATCHED = 1e-4
START = 2e-4  # a float32 model, sums and solver against the float64 oracle; the same inverse is in between
TURNED = 1e-3  # subspaces and products of factors: rounding of float32 sums over the gaps of a tiny model's spectrum
LOSS = 1e-5  # a mean loss in float32
WRONG = 1e-2  # what a negative control must at least be off by
