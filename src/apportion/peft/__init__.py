"""apportion as a PEFT method; importing this package registers it, so that `PeftModel.from_pretrained` knows it."""

from apportion.peft.registration import register

register()
