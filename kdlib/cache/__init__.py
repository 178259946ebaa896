"""Stage 1's stand-in: teacher outputs computed once, on disk. Imports torch and NumPy; reads the adapters' taps."""

from kdlib.cache._checks import CacheError
from kdlib.cache.fingerprint import Fingerprint, model_fingerprint
from kdlib.cache.store import TeacherCache
from kdlib.cache.teacher import CachedTeacher
from kdlib.cache.verify import CacheCheck, verify_cache

__all__ = [
    "CacheCheck",
    "CacheError",
    "CachedTeacher",
    "Fingerprint",
    "TeacherCache",
    "model_fingerprint",
    "verify_cache",
]
