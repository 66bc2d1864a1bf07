"""BibTeX of the papers behind detectors and backbones, by arXiv id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Paper(NamedTuple):
    """One entry; ``venue`` is a conference, or a journal if ``article``."""

    key: str
    title: str
    authors: str
    venue: str
    year: int
    article: bool = False


PAPERS = {
    # detectors
    "2106.08322": Paper(
        "dai2021dynamic",
        "Dynamic Head: Unifying Object Detection Heads with Attentions",
        "Dai, Xiyang and Chen, Yinpeng and Xiao, Bin and Chen, Dongdong and Liu, Mengchen and Yuan, Lu and Zhang, Lei",
        "CVPR",
        2021,
    ),
    "1912.02424": Paper(
        "zhang2020bridging",
        "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training Sample Selection",
        "Zhang, Shifeng and Chi, Cheng and Yao, Yongqiang and Lei, Zhen and Li, Stan Z.",
        "CVPR",
        2020,
    ),
    "1708.02002": Paper(
        "lin2017focal",
        "Focal Loss for Dense Object Detection",
        "Lin, Tsung-Yi and Goyal, Priya and Girshick, Ross and He, Kaiming and Doll{\\'a}r, Piotr",
        "ICCV",
        2017,
    ),
    "1904.01355": Paper(
        "tian2019fcos",
        "FCOS: Fully Convolutional One-Stage Object Detection",
        "Tian, Zhi and Shen, Chunhua and Chen, Hao and He, Tong",
        "ICCV",
        2019,
    ),
    "2006.09214": Paper(
        "tian2020fcos",
        "FCOS: A Simple and Strong Anchor-free Object Detector",
        "Tian, Zhi and Shen, Chunhua and Chen, Hao and He, Tong",
        "IEEE Transactions on Pattern Analysis and Machine Intelligence",
        2020,
        article=True,
    ),
    "1904.11490": Paper(
        "yang2019reppoints",
        "RepPoints: Point Set Representation for Object Detection",
        "Yang, Ze and Liu, Shaohui and Hu, Han and Wang, Liwei and Lin, Stephen",
        "ICCV",
        2019,
    ),
    "2007.11056": Paper(
        "qiu2020borderdet",
        "BorderDet: Border Feature for Dense Object Detection",
        "Qiu, Han and Ma, Yuchen and Li, Zeming and Liu, Songtao and Sun, Jian",
        "ECCV",
        2020,
    ),
    "1506.01497": Paper(
        "ren2015faster",
        "Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks",
        "Ren, Shaoqing and He, Kaiming and Girshick, Ross and Sun, Jian",
        "NeurIPS",
        2015,
    ),
    "1612.03144": Paper(
        "lin2017feature",
        "Feature Pyramid Networks for Object Detection",
        "Lin, Tsung-Yi and Doll{\\'a}r, Piotr and Girshick, Ross and He, Kaiming and Hariharan, Bharath and "
        "Belongie, Serge",
        "CVPR",
        2017,
    ),
    "1703.06870": Paper(
        "he2017mask",
        "Mask R-CNN",
        "He, Kaiming and Gkioxari, Georgia and Doll{\\'a}r, Piotr and Girshick, Ross",
        "ICCV",
        2017,
    ),
    "1906.09756": Paper(
        "cai2019cascade",
        "Cascade R-CNN: High Quality Object Detection and Instance Segmentation",
        "Cai, Zhaowei and Vasconcelos, Nuno",
        "IEEE Transactions on Pattern Analysis and Machine Intelligence",
        2019,
        article=True,
    ),
    "1712.00726": Paper(
        "cai2018cascade",
        "Cascade R-CNN: Delving into High Quality Object Detection",
        "Cai, Zhaowei and Vasconcelos, Nuno",
        "CVPR",
        2018,
    ),
    "2005.12872": Paper(
        "carion2020end",
        "End-to-End Object Detection with Transformers",
        "Carion, Nicolas and Massa, Francisco and Synnaeve, Gabriel and Usunier, Nicolas and Kirillov, Alexander and "
        "Zagoruyko, Sergey",
        "ECCV",
        2020,
    ),
    "2010.04159": Paper(
        "zhu2021deformable",
        "Deformable DETR: Deformable Transformers for End-to-End Object Detection",
        "Zhu, Xizhou and Su, Weijie and Lu, Lewei and Li, Bin and Wang, Xiaogang and Dai, Jifeng",
        "ICLR",
        2021,
    ),
    # backbones
    "1512.03385": Paper(
        "he2016deep",
        "Deep Residual Learning for Image Recognition",
        "He, Kaiming and Zhang, Xiangyu and Ren, Shaoqing and Sun, Jian",
        "CVPR",
        2016,
    ),
    "1611.05431": Paper(
        "xie2017aggregated",
        "Aggregated Residual Transformations for Deep Neural Networks",
        "Xie, Saining and Girshick, Ross and Doll{\\'a}r, Piotr and Tu, Zhuowen and He, Kaiming",
        "CVPR",
        2017,
    ),
    "2103.14030": Paper(
        "liu2021swin",
        "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
        "Liu, Ze and Lin, Yutong and Cao, Yue and Hu, Han and Wei, Yixuan and Zhang, Zheng and Lin, Stephen and "
        "Guo, Baining",
        "ICCV",
        2021,
    ),
    "1905.11946": Paper(
        "tan2019efficientnet",
        "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
        "Tan, Mingxing and Le, Quoc V.",
        "ICML",
        2019,
    ),
    "2201.03545": Paper(
        "liu2022convnet",
        "A ConvNet for the 2020s",
        "Liu, Zhuang and Mao, Hanzi and Wu, Chao-Yuan and Feichtenhofer, Christoph and Darrell, Trevor and "
        "Xie, Saining",
        "CVPR",
        2022,
    ),
    "2010.11929": Paper(
        "dosovitskiy2021image",
        "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
        "Dosovitskiy, Alexey and Beyer, Lucas and Kolesnikov, Alexander and Weissenborn, Dirk and Zhai, Xiaohua and "
        "Unterthiner, Thomas and Dehghani, Mostafa and Minderer, Matthias and Heigold, Georg and Gelly, Sylvain and "
        "Uszkoreit, Jakob and Houlsby, Neil",
        "ICLR",
        2021,
    ),
}
"""Papers by arXiv id."""

BACKBONES = {
    "resnet": "1512.03385",
    "resnext": "1611.05431",
    "test_resnet": "1512.03385",
    "swin_": "2103.14030",
    "efficientnet": "1905.11946",
    "tf_efficientnet": "1905.11946",
    "test_efficientnet": "1905.11946",
    "convnext": "2201.03545",
    "vit_": "2010.11929",
}
"""How timm's names of a backbone's family begin, to its paper; others are cited as timm."""

TIMM = """@misc{rw2019timm,
  author       = {Ross Wightman},
  title        = {PyTorch Image Models},
  year         = {2019},
  howpublished = {\\url{https://github.com/huggingface/pytorch-image-models}},
  doi          = {10.5281/zenodo.4414861}
}"""
"""timm's own entry, which stands for the implementation of every backbone."""


def bibtex(arxiv_id: str) -> str:
    """The entry of one paper.

    Args:
        arxiv_id: such as ``2106.08322`` or ``arXiv:2106.08322``.

    Raises:
        KeyError: for a paper that the table lacks.
    """
    number = arxiv_id.removeprefix("arXiv:")
    if number not in PAPERS:
        raise KeyError(f"no BibTeX entry for arXiv:{number}: add it to dyhead_zoo/citations.py")
    paper = PAPERS[number]
    fields = {
        "title": f"{{{paper.title}}}",  # doubly braced: BibTeX keeps the capitals
        "author": paper.authors,
        "journal" if paper.article else "booktitle": paper.venue,
        "year": str(paper.year),
        "eprint": number,
        "archivePrefix": "arXiv",
    }
    lines = [f"  {name:<13} = {{{value}}}" for name, value in fields.items()]
    return f"@{'article' if paper.article else 'inproceedings'}{{{paper.key},\n" + ",\n".join(lines) + "\n}"


def citations(paper_ids: Sequence[str], backbone: str) -> list[str]:
    """Entries of a detector's papers, of its backbone's, and of timm, each once.

    Args:
        paper_ids: arXiv ids of the detector's papers.
        backbone: timm's name, with or without a tag.
    """
    of_backbone = [paper for prefix, paper in BACKBONES.items() if backbone.startswith(prefix)][:1]
    numbers = dict.fromkeys(paper_id.removeprefix("arXiv:") for paper_id in (*paper_ids, *of_backbone))
    return [*map(bibtex, numbers), TIMM]
