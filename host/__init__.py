"""The seam to ComfyUI: the only place that imports its internals.

What it holds (MODEL, CLIP, VAE, CONDITIONING, files, the page) as a maker of streams, and this
pack's own model as what a model is in ComfyUI. When ComfyUI moves something, a file in here changes
and nothing else. Classes that it swaps at start-up (`CoreModelPatcher`) are looked up when they are
needed.

load_mutual_forcing.py, load_ltx2.py: files to MODEL, CLIP, VAEs (room.py: whole or as needed;
shared_out.py: over several devices) · text_encoder.py, codecs.py: our encoder as a CLIP and our
codecs as VAEs · stream_model.py, kinds.py, transformer_view.py: any MODEL as a maker of streams ·
model_wire.py: from the wire to that · decoding.py: latents through whatever VAEs are wired in ·
attention.py, page.py, folders.py: ComfyUI's kernels, its progress bar and its folders · live.py:
runs that the page plays, steers and stops.
"""
