"""Architectures that transformers lacks. Importing this package registers them with `AutoModelForCausalLM`."""

from apportion.models.deepseek import register

register()
