"""Teacher outputs that are computed once and stored on disk."""

from kdlib._arguments import prepare_arguments
from kdlib.cache._checks import CacheError
from kdlib.cache.fingerprint import Fingerprint, model_fingerprint
from kdlib.cache.layout import Layout, read_header
from kdlib.cache.store import TeacherCache
from kdlib.cache.teacher import CachedTeacher
from kdlib.cache.verify import CacheCheck, verify_cache

__all__ = [
    "CacheCheck",
    "CacheError",
    "CachedTeacher",
    "Fingerprint",
    "Layout",
    "TeacherCache",
    "model_fingerprint",
    "read_header",
    "verify_cache",
]

prepare_arguments(globals(), __all__)
