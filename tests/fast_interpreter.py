"""Triton's interpreter in half its time."""

from triton.runtime import interpreter


def install() -> None:
    """Let the interpreter prepare `triton.language` once per launch and module, not at every call of a device function.

    Triton 3.9; another version that has other internals is only slower.
    """
    patch, launch = getattr(interpreter, "_patch_lang", None), interpreter.GridExecutor.__call__
    done: set[int] = set()

    def once(function):
        if id(function.__globals__) in done:
            return interpreter._LangPatchScope()
        done.add(id(function.__globals__))
        return patch(function)

    def fresh(self, *args, **keywords):
        done.clear()
        return launch(self, *args, **keywords)

    if patch is not None and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, fresh
