"""Jinja templates of the emitted tensor expressions and of the generated host."""
