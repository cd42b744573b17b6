"""An artifact with all that an app needs beside it: what it is, how to feed it, and proof that it arrived whole."""
