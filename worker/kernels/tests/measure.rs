//! What `evener bench` measures of single kernels has the shape it was asked for.

use evener_kernels::Pool;
use evener_kernels::activation::Precision;
use evener_kernels::measure::bandwidth::{self, Buffer};
use evener_kernels::measure::linear::{self, Place};
use evener_kernels::quant::Format;

#[test]
fn every_format_is_measured_near_and_far() {
    let (mut pool, far) = (Pool::new(1, true), Buffer::new());
    // From a core under load to any memory there is.
    let rate = bandwidth::read(&far, 1);
    assert!(rate.median > 1e8 && rate.best >= rate.median && rate.best < 1e13, "{rate:?}");
    for format in Format::ALL {
        for place in [Place::Near, Place::Far] {
            // Far runs read memory beyond all caches before each: one of them is enough here.
            if place == Place::Far && format != Format::Q4_0 {
                continue;
            }
            let precision = Precision::Int8;
            let figures =
                linear::measure(&mut pool, &far, precision, format, [48, 256], &[1, 3], place);
            let ms: Vec<usize> = figures.iter().map(|figure| figure.case.m).collect();
            assert_eq!(ms, [1, 3], "{format:?}");
            for figure in figures {
                let bytes = 48 * 256 / format.block_len() * format.block_bytes();
                assert_eq!(figure.weight_bytes, bytes);
                assert!(figure.seconds > 0.0 && figure.ops_per_s() > figure.case.m as f64);
            }
        }
    }
}
