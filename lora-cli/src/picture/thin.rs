//! Fewer points that look the same.
//!
//! A spectrum has thousands of values and a plot has hundreds of pixels. First, of all points that
//! fall on one column of pixels those stay that a line through them would show: the first, the
//! lowest, the highest and the last (U. Jugel et al., "M4", VLDB 2014). Then points go whose absence
//! moves the line by less than a tolerance (Ramer 1972; Douglas and Peucker 1973).

/// The distance below which nobody sees a line move, in pixels.
const UNSEEN: f64 = 0.12;

/// At most `most` of the points, in order, with the first and the last.
pub(super) fn thin(points: &[(f64, f64)], most: usize) -> Vec<(f64, f64)> {
    let most = most.max(2);
    let coarse = columns(points, most);
    let mut tolerance = UNSEEN;
    loop {
        let kept = simplified(&coarse, tolerance);
        if kept.len() <= most {
            return kept;
        }
        tolerance *= 1.6;
    }
}

/// Of the points of a column of pixels, the four that matter.
fn columns(points: &[(f64, f64)], most: usize) -> Vec<(f64, f64)> {
    let limit = 4 * most.max(300);
    let (Some(first), Some(last)) = (points.first(), points.last()) else {
        return Vec::new();
    };
    if points.len() <= limit {
        return points.to_vec();
    }
    if points.windows(2).any(|pair| pair[0].0 > pair[1].0) {
        // A curve that goes back and forth has no columns: every so many points one.
        let stride = points.len().div_ceil(limit);
        let mut kept: Vec<_> = points.iter().step_by(stride).copied().collect();
        kept.push(*last);
        return kept;
    }
    let width = (last.0 - first.0).max(1e-9) / (limit / 4) as f64;
    let mut kept = Vec::with_capacity(limit + 4);
    let column = |point: &(f64, f64)| ((point.0 - first.0) / width) as usize;
    for run in points.chunk_by(|one, other| column(one) == column(other)) {
        let mut four = [0, 0, 0, run.len() - 1];
        for (index, point) in run.iter().enumerate() {
            if point.1 < run[four[1]].1 {
                four[1] = index;
            }
            if point.1 > run[four[2]].1 {
                four[2] = index;
            }
        }
        four.sort_unstable();
        let mut before = None;
        for index in four {
            if before != Some(index) {
                kept.push(run[index]);
                before = Some(index);
            }
        }
    }
    kept
}

/// The points without those whose absence moves the line by less than `tolerance`.
fn simplified(points: &[(f64, f64)], tolerance: f64) -> Vec<(f64, f64)> {
    if points.len() <= 2 {
        return points.to_vec();
    }
    let mut keep = vec![false; points.len()];
    keep[0] = true;
    keep[points.len() - 1] = true;
    let mut open = vec![(0, points.len() - 1)];
    while let Some((start, end)) = open.pop() {
        let mut furthest = (tolerance, None);
        for index in start + 1..end {
            let distance = from_line(points[index], points[start], points[end]);
            if distance > furthest.0 {
                furthest = (distance, Some(index));
            }
        }
        if let Some(index) = furthest.1 {
            keep[index] = true;
            open.push((start, index));
            open.push((index, end));
        }
    }
    points.iter().zip(keep).filter_map(|(point, keep)| keep.then_some(*point)).collect()
}

/// How far a point is from the line through two others, or from them if they are one point.
fn from_line(point: (f64, f64), start: (f64, f64), end: (f64, f64)) -> f64 {
    let (x, y) = (end.0 - start.0, end.1 - start.1);
    let (across, down) = (point.0 - start.0, point.1 - start.1);
    let length = x.hypot(y);
    if length < 1e-9 { across.hypot(down) } else { (x * down - y * across).abs() / length }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The height of a line of points at `x`.
    fn height(points: &[(f64, f64)], x: f64) -> f64 {
        let after = points.iter().position(|point| point.0 >= x).unwrap().max(1);
        let (start, end) = (points[after - 1], points[after]);
        start.1 + (end.1 - start.1) * (x - start.0) / (end.0 - start.0)
    }

    #[test]
    fn a_smooth_curve_stays_where_it_is() {
        let points: Vec<(f64, f64)> = (1..=4096)
            .map(|index| (f64::from(index).log10() * 200.0, 300.0 / f64::from(index).sqrt()))
            .collect();
        let thinned = thin(&points, 300);
        assert!(thinned.len() < 60, "{}", thinned.len());
        assert_eq!((thinned[0], thinned[thinned.len() - 1]), (points[0], points[4095]));
        for x in 1..720 {
            let x = f64::from(x);
            assert!((height(&thinned, x) - height(&points, x)).abs() < 0.3, "{x}");
        }
    }

    #[test]
    fn peaks_survive() {
        let mut points: Vec<(f64, f64)> =
            (0..100_000).map(|index| (f64::from(index) / 150.0, 50.0)).collect();
        points[77_777].1 = 200.0;
        points[33_333].1 = -100.0;
        let thinned = thin(&points, 50);
        assert!(thinned.len() <= 50);
        assert!(thinned.contains(&points[77_777]) && thinned.contains(&points[33_333]));
    }

    #[test]
    fn noise_is_bounded_and_so_is_what_goes_back_and_forth() {
        let noise = |index: u32| f64::from(index.wrapping_mul(2_654_435_761) >> 16) / 200.0;
        let points: Vec<(f64, f64)> =
            (0..20_000).map(|index| (f64::from(index) / 30.0, noise(index))).collect();
        assert!(thin(&points, 300).len() <= 300);
        let back: Vec<(f64, f64)> =
            (0..20_000).map(|index| (noise(index), noise(index + 7))).collect();
        let thinned = thin(&back, 300);
        assert!(thinned.len() <= 300);
        assert_eq!(thinned.last(), back.last());
    }

    #[test]
    fn few_points_are_themselves() {
        for points in [vec![], vec![(1.0, 2.0)], vec![(1.0, 2.0), (1.0, 2.0)]] {
            assert_eq!(thin(&points, 300), points);
        }
    }
}
