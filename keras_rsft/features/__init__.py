"""One pass of a frozen backbone over the samples, cached on disk."""
