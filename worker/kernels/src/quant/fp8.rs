//! Numbers of eight bits, e4m3: a sign, four bits of exponent, three of mantissa; no infinities (OCP
//! OFP8 1.0, section 5.2). A row of a matrix is kept as such numbers and one power of two, which they
//! are multiplied with.
//!
//! No file has them: rows in floats are rounded while they are loaded. Since the scale is a power of
//! two, what a row holds then is a number of bf16 and of f32 too, exactly, and rounding once more, with
//! the scale of a part of the row, changes nothing. A scale of more bits would make no row better: the
//! error of a floating number does not depend on where within its binade its neighbours lie.

/// The largest number.
pub const LARGEST: f32 = 448.0;

/// Of a row's power of two: within them all its numbers, the least of them too, are bf16 and f32.
const EXPONENTS: std::ops::RangeInclusive<i32> = -110..=119;

/// The least power of two in whose multiples a row of this largest magnitude is at most [`LARGEST`];
/// 1 if there is nothing in it. Of rows near the ends of what an f32 can be, the nearest that is
/// allowed: their numbers then lose bits, or are [`LARGEST`] times it.
#[must_use]
pub fn scale_of(largest: f32) -> f32 {
    if largest == 0.0 {
        return 1.0;
    }
    let bits = largest.to_bits();
    let (exponent, mantissa) = ((bits >> 23) as i32 - 127, bits & 0x7f_ffff);
    // 448 is 1.75 times 2^8.
    let above = i32::from(mantissa > 0x60_0000);
    power_of_two((exponent - 8 + above).clamp(*EXPONENTS.start(), *EXPONENTS.end()))
}

fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((exponent + 127) as u32) << 23)
}

/// The largest magnitude of a row of numbers that are finite.
#[must_use]
pub fn largest(row: &[f32]) -> f32 {
    // Magnitudes are ordered as their bits are, and integers may be compared in any order.
    f32::from_bits(row.iter().fold(0, |largest, x| largest.max(x.abs().to_bits())))
}

/// To the nearest, ties to even; what is beyond [`LARGEST`] becomes it.
#[inline(always)]
#[must_use]
pub fn encode(x: f32) -> u8 {
    let sign = (x.to_bits() >> 24 & 0x80) as u8;
    let magnitude = x.abs().min(LARGEST);
    // The exponent's bias goes from 127 to 7, the mantissa from 23 bits to 3.
    let bits = magnitude.to_bits();
    let normal = (bits + 0x7_ffff + (bits >> 20 & 1)).wrapping_sub(120 << 23) >> 20;
    // 2^14 is a float whose last place is 2^-9, that of the numbers below 2^-6.
    let small = (magnitude + 16384.0).to_bits() - 16384f32.to_bits();
    sign | (if magnitude < 0.015_625 { small } else { normal }) as u8
}

/// The number of a code; of the two that are none, 480 with their sign.
#[inline(always)]
#[must_use]
pub fn decode(code: u8) -> f32 {
    let magnitude = f32::from_bits(u32::from(code & 0x7f) << 20) * power_of_two(120);
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// Makes of each number what e4m3 with this scale keeps of it.
pub fn round(row: &mut [f32], scale: f32) {
    let inverse = 1.0 / scale;
    for x in row {
        *x = decode(encode(*x * inverse)) * scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All numbers, ascending.
    fn numbers() -> Vec<f32> {
        (0..=0x7e).map(decode).collect()
    }

    #[test]
    fn codes_are_those_of_the_standard() {
        for (code, number) in [
            (0x00, 0.0),
            (0x01, 0.001_953_125), // 2^-9
            (0x07, 0.013_671_875),
            (0x08, 0.015_625), // 2^-6
            (0x38, 1.0),
            (0x3c, 1.5),
            (0x7e, 448.0),
            (0xfe, -448.0),
            (0xb8, -1.0),
        ] {
            assert_eq!(decode(code), number, "{code:#x}");
            assert_eq!(encode(number), code, "{number}");
        }
        let numbers = numbers();
        assert!(numbers.windows(2).all(|two| two[0] < two[1]));
    }

    #[test]
    fn rounding_is_to_the_nearest_and_to_even_codes_between_two() {
        let numbers = numbers();
        for (low, two) in numbers.windows(2).enumerate() {
            let middle = (two[0] + two[1]) / 2.0;
            let [below, above] = [middle.next_down(), middle.next_up()].map(encode);
            assert_eq!((below, above), (low as u8, low as u8 + 1), "beside {middle}");
            assert_eq!(encode(middle), (low as u8).next_multiple_of(2), "{middle}");
            assert_eq!(encode(-two[1]), 0x80 | (low as u8 + 1));
        }
        assert_eq!([449.0, 1e30, f32::INFINITY].map(encode), [0x7e; 3]);
    }

    #[test]
    fn a_row_uses_what_there_is_and_rounding_it_again_changes_nothing() {
        for (largest, scale) in [
            (448.0, 1.0),
            (449.0, 2.0),
            (1.0, 1.0 / 256.0),
            (0.0, 1.0),
            (1.75, 1.0 / 256.0),
            (1.7501, 1.0 / 128.0),
            (f32::MAX, power_of_two(119)),
            (f32::MIN_POSITIVE, power_of_two(-110)),
        ] {
            assert_eq!(scale_of(largest), scale, "{largest}");
        }
        let mut row: Vec<f32> = (1..500).map(|i| (i as f32 * 0.37).sin() / i as f32).collect();
        let exact = row.clone();
        let scale = scale_of(largest(&row));
        round(&mut row, scale);
        for (rounded, exact) in row.iter().zip(&exact) {
            let error = (rounded - exact).abs();
            assert!(error <= exact.abs() / 16.0 || error <= scale / 1024.0, "{exact}: {rounded}");
            assert_eq!(half::bf16::from_f32(*rounded).to_f32(), *rounded, "it is a bf16");
        }
        // A part of the row has a scale of its own.
        let part = &row[100..];
        let mut again = part.to_vec();
        round(&mut again, scale_of(largest(part)));
        assert_eq!(again, part);
        let mut ends = [f32::MAX, -f32::MAX, 1e30];
        round(&mut ends, scale_of(f32::MAX));
        assert!(ends.iter().all(|x| x.is_finite()));
    }
}
