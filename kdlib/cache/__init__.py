"""Stage 1's stand-in: teacher outputs computed once, on disk. Imports torch and NumPy; reads the adapters' taps."""

from kdlib.cache.fingerprint import model_fingerprint
from kdlib.cache.layout import CacheError
from kdlib.cache.store import TeacherCache
from kdlib.cache.teacher import CachedTeacher

__all__ = ["CacheError", "CachedTeacher", "TeacherCache", "model_fingerprint"]
