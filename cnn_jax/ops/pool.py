def max_pool(x, window):
    n, h, w, c = x.shape
    kh, kw = window
    x = x[:, : h // kh * kh, : w // kw * kw]
    return x.reshape(n, h // kh, kh, w // kw, kw, c).max((2, 4))
