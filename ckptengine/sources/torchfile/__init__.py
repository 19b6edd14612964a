"""Files of torch.save (``.pt``, ``.pth``, ``.bin``) as checkpoints of their own."""
