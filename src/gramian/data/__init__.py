"""Text as token streams: an embedded default, real files by path."""
