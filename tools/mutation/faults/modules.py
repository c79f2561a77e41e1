"""Faults in what stands on attention(): pages, caches, layers, the patch of torch's function, and weights."""

from __future__ import annotations

from ..fault import Fault

PAGES = ("tests/nn/test_paging.py -k 'not compiled'",)
CACHES = ("tests/nn/test_caches.py -k 'not compiled'",)
LAYER = ("tests/nn/test_attention_layer.py -k 'not compiled'",)
TORCHS = ("tests/nn/test_multihead.py -k 'not compiles'",)
PATCH = ("tests/nn/test_patch.py -k 'not compiled'",)
WEIGHTS = ("tests/nn/test_weights.py",)


def of(file: str, tests: tuple[str, ...], *rows: tuple[str, str]) -> list[Fault]:
    return [Fault(file, before, after, tests) for before, after in rows]


FAULTS: list[Fault] = [
    *of(
        "posattn/paging.py",
        PAGES,
        ("torch.where(first «<» k_lengths[:, None]", "<="),
        ("first = torch.arange(entries, device=block_table.device) «* page»", ""),
        ("block_table, «0»)", "-1"),
    ),
    *of(
        "posattn/validation.py",
        PAGES,
        ("if longest «>» block_table.shape[1] * page:", ">="),
        ("block_table[torch.arange(block_table.shape[1]) * page «<» k_lengths[:, None]]", "<="),
        ("if low < 0 or high «>=» pages:", ">"),
        ("if «low < 0 or» high >= pages:", ""),
        ("if v.shape[:«3»] != k.shape[:3]:", "2"),
    ),
    *of(
        "posattn/kv_cache.py",
        CACHES,
        ("buffer[:, :, start : start + count] = column[:, :, :«count»]", "start + count"),
        ("new[:, :, :«held»] = old[:, :, :held]", "0"),
        ("if self._buffers and tokens «<=» self.capacity:", "<"),
        ("capacity = max(tokens, «2 *» self.capacity", ""),
        ("if len(set(self._lengths)) > «1»:", "2"),
        ('found[«"offset"»] = torch.tensor(past', '"k_starts"'),
        ("self._lengths = [self._lengths[row] for row in «order»]", "range(len(order))"),
        ("torch.where(token «<» new[:, None]", ">="),
        ("for buffer in (*self._buffers, «self._lengths»):", "self._lengths.clone()"),
        ("fits = (total «<=» self.tokens).all()", "<"),
        ("sources = torch.arange(rows.shape[0]) - («counts.cumsum(0) - counts»)[rows]", "counts.cumsum(0)"),
        ("not 0 <= min(found) <= max(found) «<=» tokens", "<"),
        ("«tensor.requires_grad and» torch.is_grad_enabled():", ""),
        ("«column.detach()»[rows, :, sources]", "column.detach().flip(2)"),
    ),
    *of(
        "posattn/paged_cache.py",
        CACHES,
        ("if «more and» filled:", ""),
        ("if more «and filled»:", ""),
        ("if holders > «1»:", "2"),
        ("left[page] = holders «- 1»", ""),
        ("if len(copied) «+ len(fresh)» > len(self._free):", ""),
        ("if «len(copied) +» len(fresh) > len(self._free):", ""),
        ("pool[target] = pool[«source»]", "target"),
        ("for page in before: «self._let_go(page)»", "pass"),
        ("if self._holders[page] == «0»:", "1"),
        ("self._pages(source)[: «-(-tokens // self.page)»]", "tokens // self.page"),
        ("slots = pages * cache.page + places «% cache.page»", ""),
        ("sources = [«self.rows[row]» for row in check_rows", "row"),
        ("cache._hold(row, held, «tokens»)", "0"),
        ("self._holders[page] = «1»", "2"),
        ("if self._lengths[row] + more «>» room:", ">="),
    ),
    *of(
        "posattn/nn/attention.py",
        LAYER,
        ("dropout_p=self.dropout «if self.training else 0.0»,", ""),
        ("q = «self.q_norm(q)»", "self.k_norm(q)"),
        ("k = «self.k_norm(k)» v", "k"),
        ("bias=«bias if out_bias is None else out_bias», **made)", "bias"),
        ('{"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": «memory_cu_seqlens»}', "cu_seqlens"),
        ("window=«self.window»,", "None"),
        ("scale=«self.scale»,", "None"),
        ("softcap=«self.softcap»,", "None"),
        ("sinks=«self.sinks»,", "None"),
        ('options["k_starts"] = «starts»', "starts * 0"),
        ('{"k_lengths": lengths, "offset": «0»}', "None"),
    ),
    *of(
        "posattn/nn/multihead.py",
        TORCHS,
        ('options["mask"] = «~given» if', "given"),
        ('options["mask"] «&» ~given', "|"),
        ('options["bias"] «+» given', "-"),
        ("if is_causal and «q.shape[2] == k.shape[2]»:", "True"),
        ("attn_mask.unflatten(0, («q.shape[0], self.num_heads»))", "self.num_heads, -1"),
        ("[..., 0].float() «* self.head_dim**-0.5»", ""),
        ("total = torch.logaddexp(lse, «extra»)", "extra * 0"),
        ("columns.append((«-total»).exp()[..., None])", "total"),
        ("own, added = total, extra[:, :, «start : start + ROWS»].to(total.dtype)", ": ROWS"),
        ("shown.append(«w.mean(1) if average else w»)", "w"),
        ("joined = (out.transpose(1, 2) if first else out.permute(«2, 0», 1, 3))", "0, 2"),
        ("«self.register_forward_pre_hook(_unchanged)»", ""),
        ("F.dropout((extra - total).exp(), «dropout»)", "0.0"),
    ),
    *of(
        "posattn/nn/transformer.py",
        TORCHS,
        ("self.activation_relu_or_gelu = «0»", "1"),
        ("«self.self_attn.load_state_dict(drawn, strict=False, assign=True)»", "self.self_attn.to_empty(device='cpu')"),
        ("return x + self._ff_block(self.norm2(«x»))", "src"),
    ),
    *of(
        "posattn/patch.py",
        PATCH,
        ("if not stack: return «theirs(*args, **kwargs)»", "scaled_dot_product_attention(*args, **kwargs)"),
        ('"position": stack[«-1»].position', "0"),
        ("torch.backends.mha.set_fastpath_enabled(«False»)", "True"),
        ("torch.backends.mha.set_fastpath_enabled(«fast_path»)", "False"),
        ("if «F.scaled_dot_product_attention is routed»:", "True"),
        ("_count «-= 1»", "-= 2"),
        ('stack = getattr(_here, "stack", None) «or _everywhere»', ""),
        ("del stack[«len(stack) - 1 - stack[::-1].index(self)»]", "0"),
    ),
    *of(
        "posattn/weights.py",
        WEIGHTS,
        ("key_head = head // («call.q.shape[1] // call.k.shape[1]»)", "call.k.shape[1]"),
        ("mask.boolean.shape[1] > «1»:", "9"),
        ("sinks=None if call.sinks is None else call.sinks[«head», None]", "0"),
        ("if not «-size» <= index < size:", "-size - 1"),
        ("q=call.q«.float()», k=call.k.float()", ""),
    ),
]
