"""One page template and one set of plots."""
