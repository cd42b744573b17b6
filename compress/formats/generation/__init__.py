"""Text generation through opened graphs: greedy decoding, beam search, speech recognition and image captions."""
