"""What a user does with the library: swap it into a model, check it, look at it, time it."""
