"""A small temporal-adapter training in its own process: `python training_run.py OUT [--slow]`"""

import sys
import time

import torch
from safetensors.torch import save_file

from smooth_foley.backbone import make_text_encoder, make_unet, tokenize_prompt
from smooth_foley.clip import build_tokenizer
from smooth_foley.mel import MelTransform
from smooth_foley.schedule import make_scheduler
from smooth_foley.temporal_adapter import make_temporal_adapter
from smooth_foley.train.diffusion import TemporalStage
from smooth_foley.train.loop import TrainConfig, train

CFG = TrainConfig(
    max_train_steps=40,
    train_batch_size=4,
    mixed_precision="no",
    learning_rate=1e-3,
    lr_warmup_steps=5,
    checkpointing_steps=5,
    log_steps=5,
    ema_decay=0.9,
)


def main(out, slow=False):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mel = MelTransform.mini(n_mels=32, n_cols=64)
    tok = build_tokenizer(["airplane flyby"], 520)
    text = make_text_encoder(tok, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    unet = make_unet(
        channels=2,
        block_out_channels=(8, 16),
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim=16,
        sample_size=(2, 4),
    )
    net = make_temporal_adapter(unet, mel.config.fold**2, (8, 8, 8)).train()
    frozen = {f"{n}.{k}": v.clone() for n, m in (("unet", unet), ("text", text)) for k, v in m.state_dict().items()}
    before = {k: v.clone() for k, v in net.state_dict().items()}
    stage = TemporalStage(dict(controlnet=net), dict(unet=unet, text_encoder=text, mel=mel), tok, make_scheduler())
    z, on, ids = torch.randn(12, 2, 2, 4), torch.rand(12, 64) > 0.5, tokenize_prompt(tok, text, ["airplane flyby"] * 12)

    def rows(i):
        if slow:
            time.sleep(0.1)
        return dict(z=z[i], sounding=on[i], ids=ids[i], ids_long=ids[i])

    train(stage, rows, 12, CFG, out)
    after = {f"{n}.{k}": v for n, m in (("unet", unet), ("text", text)) for k, v in m.state_dict().items()}
    assert all(torch.equal(v, frozen[k]) for k, v in after.items()), "a frozen parameter changed"
    assert any(not torch.equal(v, before[k]) for k, v in net.state_dict().items()), "nothing was trained"
    import os

    if os.environ.get("RANK", "0") == "0":
        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, f"{out}/final.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], "--slow" in sys.argv)
