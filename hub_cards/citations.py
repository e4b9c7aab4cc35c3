"""The papers that a card cites, as BibTeX."""

from collections.abc import Iterable

from .checkpoint_facts import StageRecord
from .rendering import Markdown


CITATIONS = {
    "proclip": """@article{hu2025proclip,
  title = {ProCLIP: Progressive Vision-Language Alignment via LLM-based Embedder},
  author = {Hu, Xiaoxing and Yang, Kaicheng and Gong, Ziyang and Ming, Qi and Guo, Zonghao and Tian, Yu and An, Xiang and Feng, Ziyong and Yang, Xue},
  journal = {arXiv preprint arXiv:2510.18795},
  year = {2025}
}""",
    "llm2clip": """@article{huang2024llm2clip,
  title = {LLM2CLIP: Powerful Language Model Unlocks Richer Visual Representation},
  author = {Huang, Weiquan and Wu, Aoqi and Yang, Yifan and Luo, Xufang and Yang, Yuqing and Hu, Liang and Dai, Qi and Wang, Chunyu and Dai, Xiyang and Chen, Dongdong and Luo, Chong and Qiu, Lili},
  journal = {arXiv preprint arXiv:2411.04997},
  year = {2024}
}""",
    "lit": """@inproceedings{zhai2022lit,
  title = {LiT: Zero-Shot Transfer with Locked-image text Tuning},
  author = {Zhai, Xiaohua and Wang, Xiao and Mustafa, Basil and Steiner, Andreas and Keysers, Daniel and Kolesnikov, Alexander and Beyer, Lucas},
  booktitle = {CVPR},
  note = {arXiv:2111.07991},
  year = {2022}
}""",
    "clip": """@inproceedings{radford2021clip,
  title = {Learning Transferable Visual Models From Natural Language Supervision},
  author = {Radford, Alec and Kim, Jong Wook and Hallacy, Chris and Ramesh, Aditya and Goh, Gabriel and Agarwal, Sandhini and Sastry, Girish and Askell, Amanda and Mishkin, Pamela and Clark, Jack and Krueger, Gretchen and Sutskever, Ilya},
  booktitle = {ICML},
  note = {arXiv:2103.00020},
  year = {2021}
}""",
    "siglip": """@inproceedings{zhai2023siglip,
  title = {Sigmoid Loss for Language Image Pre-Training},
  author = {Zhai, Xiaohua and Mustafa, Basil and Kolesnikov, Alexander and Beyer, Lucas},
  booktitle = {ICCV},
  note = {arXiv:2303.15343},
  year = {2023}
}""",
}
_TOWER_PAPERS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip", "siglip2_vision_model": "siglip"}


def citations(training: Iterable[StageRecord], vision_type: str = "") -> Markdown:
    """What to cite for a checkpoint, by the methods that the stages of its `training` name ("proclip", "llm2clip", "lit"); without any, ProCLIP
    and LLM2CLIP, whose architecture it has. `vision_type` is the `model_type` of its image encoder.
    """
    methods = {str(stage.settings["method"]) for stage in training if "method" in stage.settings}
    methods = methods | {"llm2clip"} if methods else {"proclip", "llm2clip"}
    keys = [key for key in CITATIONS if key in methods]
    if vision_type in _TOWER_PAPERS:
        keys.append(_TOWER_PAPERS[vision_type])
    return Markdown("\n\n".join(CITATIONS[key] for key in keys))
