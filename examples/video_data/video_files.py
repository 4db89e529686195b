"""Names of video files, and the errors of reading them."""

VIDEO_SUFFIXES = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".mpg", ".mpeg", ".m4v")


class VideoError(RuntimeError):
    """A video cannot be read. The message says why, without the path."""


class Unreachable(VideoError):
    """The place of a video cannot be reached now; the video may be whole."""
