"""The papers that a card cites, as BibTeX."""

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
_OF_TOWER = {"clip_vision_model": "clip", "siglip_vision_model": "siglip", "siglip2_vision_model": "siglip"}


def citations(methods: set[str], vision_type: str) -> list[str]:
    """What to cite for a checkpoint.

    Args:
        methods: "proclip", "llm2clip" or "lit", as the stages of its training name them. Without any, ProCLIP and LLM2CLIP, whose
            architecture it has.
        vision_type: `model_type` of its image encoder.
    """
    methods = methods | {"llm2clip"} if methods else {"proclip", "llm2clip"}
    keys = [key for key in CITATIONS if key in methods]
    if vision_type in _OF_TOWER:
        keys.append(_OF_TOWER[vision_type])
    return [CITATIONS[key] for key in keys]
