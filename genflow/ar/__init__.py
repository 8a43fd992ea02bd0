"""Image tokens: how they are made, the model of them, and its decoders.

One idea stands behind every decoder but the plain one: guess in parallel, verify all guesses in one pass, keep what holds.
It is also that of Picard sampling and of the inverse of an autoregressive flow (samplers/fixed_point.py).
"""
