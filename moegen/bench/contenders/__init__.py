"""moegen and what people would use instead; `roster` says who, and `team` is how the benchmark talks to them."""
