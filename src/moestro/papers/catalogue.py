"""The 52 published systems: number, short name, title, year, arXiv number, and what each one adds. No torch here."""

from __future__ import annotations

import dataclasses

from ..core.errors import UserError, did_you_mean

__all__ = ["CATALOGUE", "Entry", "entry"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One system. slug: its name on the command line. year: of the first version. adds: what is new, in one line."""

    number: int
    slug: str
    title: str
    year: int
    arxiv: str
    adds: str

    @property
    def module(self) -> str:
        """Name of the file in this folder that shows it, where there is one."""
        return self.slug.replace("-", "_")


# Number, slug, year, arXiv number; title; + what it adds.
_TABLE = """
01 dense2moe 2025 2510.09094
  Dense2MoE: Restructuring Diffusion Transformer to MoE for Efficient Text-to-Image Generation
  + a trained dense diffusion transformer becomes sparse in width and in depth, by a split by importance and
    distillation

02 thor 2021 2110.04260
  Taming Sparsely Activated Transformer with Stochastic Experts
  + experts drawn at random in training and inference, kept alike by a consistency loss between two passes

03 similarity-attention-aware-smoe 2025 2505.00792
  Improving Routing in Sparse Mixture of Experts with Graph of Tokens
  + a token's routing is averaged with that of similar or attended tokens, so that choices change less late in
    training

04 t2mir 2025 2506.05426
  Mixture-of-Experts Meets In-Context Reinforcement Learning
  + two expert layers side by side in decision transformers: one routes tokens, one routes tasks by contrast

05 bam 2024 2408.08274
  BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts
  + several fine-tuned copies of one dense model become a mixture that keeps their attention as experts too

06 edge-moe 2023 2305.18691
  Edge-MoE: Memory-Efficient Multi-Task Vision Transformer Architecture with Task-level Sparsity via
    Mixture-of-Experts
  + an FPGA accelerator of multi-task vision transformers that reads every expert's weights once

07 structured-radiology-t5 2022 2209.12177
  Application of Deep Learning in Generating Structured Radiology Reports: A Transformer-Based Technique
  + free-text findings become nested fields and values by one sequence-to-sequence model (no experts)

08 lsh-moe 2024 2411.08446
  LSH-MoE: Communication-efficient MoE Training via Locality-Sensitive Hashing
  + ranks send means of hashed groups of tokens instead of tokens, and add each token's offset back afterwards

09 time-moe 2024 2409.16040
  Time-MoE: Billion-Scale Time Series Foundation Models with Mixture of Experts
  + a sparse decoder over single observations that forecasts any horizon through several output heads

10 speculative-moe 2025 2503.04398
  Speculative MoE: Communication Efficient Parallel MoE Inference with Speculative Token and Expert
    Pre-scheduling
  + experts and tokens are placed together by routing predicted from token ids, so that fewer rows cross devices

11 uoe 2025 2503.02495
  Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer
  + one transformer cut into experts, heads and slices of its MLP, that equals the dense model when all are on

12 m2r2 2025 2502.02040
  M2R2: Mixture of Multi-Rate Residuals for Efficient Transformer Inference
  + a second, faster residual stream that serves early exits, drafts of tokens and forecasts of experts

13 robust-qa-moe 2022 2204.09598
  Build a Robust QA System with Transformer-based Mixture of Experts
  + experts on or in a span reader, and augmented questions, for domains with about a hundred examples

14 moetuner 2025 2502.06643
  MoETuner: Optimized Mixture of Expert Serving with Balanced Expert Placement and Token Routing
  + integer programs place experts on devices from a profile: equal loads, little traffic between layers

15 ubimoe 2025 2502.05602
  UbiMoE: A Ubiquitous Mixture-of-Experts Vision Transformer Accelerator With Hybrid Computation Pattern on FPGA
  + a generator of FPGA designs: streaming attention beside one reused linear kernel, sizes found by search

16 gnt-move 2023 2308.11793
  Enhancing NeRF akin to Enhancing LLMs: Generalizable NeRF Transformer with Mixture-of-View-Experts
  + experts in the view transformer of a renderer, one always on, and a loss that routes neighbouring points
    alike

17 moe-parallel-folding 2025 2504.14960
  MoE Parallel Folding: Heterogeneous Parallelism Mappings for Efficient Large-Scale MoE Model Training with
    Megatron Core
  + attention and expert layers lie on the same ranks in two independent layouts, with one dispatcher for both

18 hsqformer 2025 2502.03772
  A Retrospective Systematic Study on Hierarchical Sparse Query Transformer-assisted Ultrasound Screening for
    Early Hepatocellular Carcinoma
  + learned queries read the fused features of two image backbones level by level, through sparse experts

19 fastdit-3d 2023 2312.07231
  Fast Training of Diffusion Transformer with Extreme Masking for 3D Point Clouds Generation
  + diffusion over voxels whose encoder sees about one percent of the tokens, drawn apart from full and empty
    space

20 shiftaddvit 2023 2306.06446
  ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision Transformer
  + multiplications become shifts and additions; a router with a latency-aware loss keeps some where they matter

21 dynamic-routing 2024 2403.07652
  Harder Tasks Need More Experts: Dynamic Routing in MoE Models
  + each token takes the fewest experts whose probabilities pass a threshold; an entropy loss keeps them few

22 m3vit 2022 2210.14793
  M3ViT: Mixture-of-Experts Vision Transformer for Efficient Multi-task Learning with Model-Accelerator
    Co-design
  + a vision transformer routed by task, of which one task trains and runs only its own experts

23 muon-mla-moe 2025 2509.24406
  Muon: Training and Trade-offs with Latent Attention and MoE
  + the Muon optimiser measured together with latent attention and fine-grained experts

24 hunyuan-turbos 2025 2505.15431
  Hunyuan-TurboS: Advancing Large Language Models through Mamba-Transformer Synergy and Adaptive
    Chain-of-Thought
  + state-space, attention and expert layers in one decoder, and training that chooses short or long reasoning

25 hidream-i1 2025 2505.22705
  HiDream-I1: A High-Efficient Image Generative Foundation Model with Sparse Diffusion Transformer
  + a sparse diffusion transformer of two streams, then one, with a language layer's text for every block

26 animer-plus 2025 2508.00298
  AniMer+: Unified Pose and Shape Estimation Across Mammalia and Aves via Family-Aware Transformer
  + a quarter of every feed-forward output belongs to the animal's family, chosen by its label

27 tunbert 2021 2111.13138
  TunBERT: Pretrained Contextualized Text Representation for Tunisian Dialect
  + a text encoder trained from scratch on a small, noisy crawl of one dialect (no experts)

28 plantbert 2025 2506.08897
  PlantBert: An Open Source Language Model for Plant Science
  + an encoder with disentangled attention that tags plant-stress abstracts, with rules and ontology links (no
    experts)

29 faantra 2025 2504.12021
  Action Anticipation from SoccerNet Football Video Broadcasts
  + queries that say which football actions follow in the next seconds, and when (no experts)

30 dit-moe 2024 2407.11633
  Scaling Diffusion Transformers to 16 Billion Parameters
  + class-conditional diffusion with shared and routed experts in every block

31 bigmac 2025 2502.16927
  BigMac: A Communication-Efficient Mixture-of-Experts Model Structure for Fast Training and Inference
  + tokens are narrowed before they travel to experts and widened after, so that a quarter of the bytes move

32 mola 2024 2402.08562
  Higher Layers Need More LoRA Experts
  + mixtures of low-rank adapters with another number of experts in every layer

33 isdrama 2025 2504.20630
  ISDrama: Immersive Spatial Drama Generation through Multimodal Prompting
  + two-ear drama speech by flow matching, through a group of experts for prosody and then one for space

34 contrastive-moe-embeddings 2024 2401.15713
  Contrastive Learning and Mixture of Experts Enables Precise Vector Embeddings
  + an encoder's MLPs are copied into one expert per domain, chosen by a domain token, and trained by contrast

35 tutel-flex 2022 2206.03382
  Tutel: Adaptive Mixture-of-Experts at Scale
  + one layout of weights from which every kind of expert parallelism is reached by changing one number per step

36 expertrag 2025 2504.08744
  ExpertRAG: Efficient RAG with Mixture of Experts - Optimizing Context Retrieval for Adaptive LLM Responses
  + retrieval as one more expert behind a gate, consulted only where it pays

37 zaya1-amd 2025 2511.17127
  Training Foundation Models on a Full-Stack AMD Platform: Compute, Networking, and System Design
  + convolutional latent attention, a router with memory over depth and scaled residuals, for top-1 experts

38 megadance 2025 2505.17543
  MEGADance: Mixture-of-Experts Architecture for Genre-Aware 3D Dance Generation
  + dance tokens from music through one universal expert and the expert of the genre in every layer

39 optimal-sparsity 2025 2508.18672
  Optimal Sparsity of Mixture-of-Experts Language Models for Reasoning Tasks
  + sweeps at equal active compute that part memorising, which wants more experts, from reasoning, which does
    not

40 modular-vision-mtht 2023 2306.17165
  An Efficient General-Purpose Modular Vision Model via Multi-Task Heterogeneous Training
  + one sparse vision model trained on several data sets, then pruned, extended and mixed module by module

41 smoe-dropout 2023 2303.01610
  Sparse MoE as the New Dropout: Scaling Dense and Self-Slimmable Transformers
  + a frozen random router and a growing number of experts: a dense model results that can be slimmed at will

42 yolo-master 2025 2512.23273
  YOLO-Master: MOE-Accelerated with Specialized Transformers for Enhanced Real-time Detection
  + a detector whose convolution experts of several kernel sizes are chosen per image

43 promoe 2025 2510.24711
  Routing Matters in MoE: Scaling Diffusion Transformers with Explicit Routing Guidance
  + diffusion tokens routed by role, then by learned prototypes that a contrastive loss keeps apart

44 point-moe 2025 2505.23926
  Point-MoE: Towards Cross-Domain Generalization in 3D Semantic Segmentation via Mixture-of-Experts
  + a point transformer for many kinds of scenes whose output projections are experts, without labels of the
    kind

45 growing-transformers 2025 2507.07129
  Growing Transformers: Modular Composition and Layer-wise Expansion on a Frozen Substrate
  + embeddings fixed in advance and without meaning, on which models are grown by layers and merged by averaging

46 clip-moe 2024 2409.19291
  CLIP-MoE: Towards Building Mixture of Experts for CLIP with Diversified Multiplet Upcycling
  + several fine-tuned copies of one image-text encoder, each with other features, become experts of one

47 pre-gated-moe 2023 2308.12066
  Pre-gated MoE: An Algorithm-System Co-Design for Fast and Scalable Mixture-of-Expert Inference
  + a block chooses the experts of the next one, so that offloaded weights arrive in time

48 ewa 2023 2308.06093
  Experts Weights Averaging: A New General Training Scheme for Vision Transformers
  + experts with randomly parted tokens, pulled together after every step and averaged into one layer at the end

49 m2mkd 2024 2402.16918
  m2mKD: Module-to-Module Knowledge Distillation for Modular Transformers
  + modules of a sparse student learn one by one from modules of a teacher, each inside a small shared network

50 moirai-moe 2024 2410.10469
  Moirai-MoE: Empowering Time Series Foundation Models with Sparse Mixture of Experts
  + a probabilistic forecaster whose router is a table of cluster centres taken from a dense model

51 ssm-medical-survey 2024 2406.03430
  Computation-Efficient Era: A Comprehensive Survey of State Space Models in Medical Image Analysis
  + state-space scans over images as interchangeable parts, with reference networks and counted costs

52 engram 2026 2601.07372
  Conditional Memory via Scalable Lookup: A New Axis of Sparsity for Large Language Models
  + tables of learned vectors found by hashing the last tokens: sparse memory beside sparse experts
"""


def _read(block: str) -> Entry:
    head, _, rest = block.partition("\n")
    number, slug, year, arxiv = head.split()
    title, adds = (" ".join(part.split()) for part in rest.split("  + "))
    return Entry(int(number), slug, title, int(year), arxiv, adds)


CATALOGUE: dict[str, Entry] = {e.slug: e for e in map(_read, _TABLE.strip().split("\n\n"))}


def entry(name: str) -> Entry:
    """The entry of this slug or number. Raises `UserError` for an unknown one."""
    for found in CATALOGUE.values():
        if name == found.slug or (name.isdigit() and int(name) == found.number):
            return found
    raise UserError(f"no system {name!r}{did_you_mean(name, CATALOGUE)}; moestro papers lists all")
