"""Every private or version-dependent name of the libraries underneath, each with what breaks without it."""
