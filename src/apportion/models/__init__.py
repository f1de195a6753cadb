"""Architectures that transformers lacks; importing this package makes `AutoModelForCausalLM` know them."""

from apportion.models.deepseek import register

register()
