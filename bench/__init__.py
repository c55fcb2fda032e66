"""Programs that price and time the kernels. Nothing in the packages imports them."""
