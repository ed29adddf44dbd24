"""Triton's interpreter at a third of its time: it patches its language anew at every call of a device function."""

import triton.language as tl
from triton.runtime import interpreter


def call(self, *args, **kwargs):
    languages = self.__dict__.get("languages")
    if languages is None:
        languages = self.__dict__["languages"] = [m for m in self.fn.__globals__.values() if m is tl or m is tl.core]
    if any(tl.core.is_builtin(language.arange) for language in languages):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


def install():
    interpreter.InterpretedFunction.__call__ = call
