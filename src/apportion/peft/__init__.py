"""apportion as a PEFT method. Importing this package registers it for `PeftModel.from_pretrained`."""

from apportion.peft.registration import register

register()
