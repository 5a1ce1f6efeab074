"""Scale `patch`: β and the planes of every im2col row, in two kernels.

pixels  each pixel once: what the rows are made of, zeros around the image, and of each pixel its signs and Σ|x|.
rows    each window: β_1 is a sum of such sums, plane 1 a copy of such signs, since both are of x itself. Only from R_1
        on do the values of a window depend on the window; then one pass over it gives β_{k+1} = mean|R_k| and plane
        k+1, the signs of R_k, together.
"""

from .pixels import pixels
from .rows import rows, rows_of_given
from .spec import Patch

__all__ = ["Patch", "pixels", "rows", "rows_of_given"]
