"""A language model's view of rankings: batches, packed rows, the output layer, log-probs, adapters."""
