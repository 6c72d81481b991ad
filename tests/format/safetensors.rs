//! The container (F1 to F6), held against the reference crate.

use std::collections::{BTreeMap, HashMap};

use lora_format::Dtype;
use lora_format::container::safetensors::{Declared, Header, encode_header, storage_order};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::Value;

use crate::native::{encoded, random_adapter, vectors};
use crate::peft::cases;
use crate::{Random, read};

/// A tensor's dtype, shape and offsets.
type Entry = (String, Vec<usize>, (usize, usize));

/// What a header says, in the terms of either implementation.
#[derive(Debug, PartialEq)]
struct Content {
    data_start: usize,
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, Entry>,
}

fn ours(bytes: &[u8]) -> Option<Content> {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = Header::parse(&bytes[8..8 + length], (bytes.len() - 8 - length) as u64).ok()?;
    let tensors = header.tensors.iter().map(|tensor| {
        let offsets = (tensor.start as usize, tensor.end as usize);
        (tensor.name.clone(), (tensor.dtype.to_string(), tensor.shape.clone(), offsets))
    });
    Some(Content {
        data_start: header.data_start as usize,
        metadata: header.metadata.iter().cloned().collect(),
        tensors: tensors.collect(),
    })
}

fn theirs(bytes: &[u8]) -> Result<Content, safetensors::SafeTensorError> {
    let (length, metadata) = SafeTensors::read_metadata(bytes)?;
    let tensors = metadata.tensors().into_iter().map(|(name, info)| {
        (name, (info.dtype.to_string(), info.shape.clone(), info.data_offsets))
    });
    Ok(Content {
        data_start: 8 + length,
        metadata: metadata.metadata().clone().unwrap_or_default().into_iter().collect(),
        tensors: tensors.collect(),
    })
}

/// F1, F4: the crate opens every file that we write, and finds in it what we find.
#[test]
fn the_crate_reads_what_we_write() {
    let mut files: Vec<Vec<u8>> =
        vectors().iter().map(|path| encoded(&read(path).unwrap())).collect();
    let mut random = Random(2);
    files.extend((0..50).map(|_| encoded(&random_adapter(&mut random))));
    files.extend(cases().iter().map(|case| encoded(&read(&case.join("adapter")).unwrap())));
    for bytes in files {
        let content = ours(&bytes).unwrap();
        assert_eq!(theirs(&bytes).unwrap(), content);
        assert_eq!(content.data_start % 8, 0);
        for (name, (dtype, _, (start, _))) in &content.tensors {
            let bits = dtype.parse::<Dtype>().unwrap().bits() as usize;
            assert_eq!(start % (bits / 8), 0, "{name} is not aligned");
        }
        let crates = SafeTensors::deserialize(&bytes).unwrap();
        for (name, (_, shape, (start, end))) in &content.tensors {
            let tensor = crates.tensor(name).unwrap();
            let data = &bytes[content.data_start..][*start..*end];
            assert_eq!((tensor.shape(), tensor.data()), (&shape[..], data));
        }
    }
}

/// A tensor to be stored: name, dtype, shape, bytes.
type Made = (String, Dtype, Vec<usize>, Vec<u8>);

fn random_tensors(random: &mut Random) -> Vec<Made> {
    let dtypes: Vec<Dtype> = Dtype::all().collect();
    let mut tensors: BTreeMap<String, Made> = BTreeMap::new();
    for _ in 0..random.below(12) {
        let dtype = *random.pick(&dtypes);
        let shape: Vec<usize> = (0..random.below(4)).map(|_| random.below(5)).collect();
        // Sub-byte tensors must fill whole bytes.
        let Some(count) = dtype.tensor_bytes(&shape) else { continue };
        let name = random.text(8);
        tensors.insert(name.clone(), (name, dtype, shape, random.bytes(count as usize)));
    }
    tensors.into_values().collect()
}

fn our_file(mut tensors: Vec<Made>, metadata: &[(String, String)]) -> Vec<u8> {
    tensors.sort_by(|x, y| storage_order((x.1, &x.0), (y.1, &y.0)));
    let declared = tensors.iter().map(|(name, dtype, shape, bytes)| Declared {
        name,
        dtype: *dtype,
        shape,
        bytes: bytes.len() as u64,
    });
    let mut file = encode_header(metadata, declared);
    tensors.iter().for_each(|tensor| file.extend_from_slice(&tensor.3));
    file
}

/// F4, F5: with at most one entry of metadata (the crate's order of more is random), our bytes are
/// the crate's.
#[test]
fn our_encoder_gives_the_crates_bytes() {
    let mut random = Random(3);
    for round in 0..500 {
        let tensors = random_tensors(&mut random);
        let metadata: Vec<(String, String)> =
            (0..random.below(2)).map(|_| (random.text(6), random.text(30))).collect();
        let map: HashMap<String, String> = metadata.iter().cloned().collect();
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            let dtype = serde_json::from_value(Value::from(dtype.name())).unwrap();
            (name, TensorView::new(dtype, shape.clone(), bytes).unwrap())
        });
        let expected = safetensors::serialize(views, (!map.is_empty()).then_some(map)).unwrap();
        let found = our_file(tensors, &metadata);
        assert!(found == expected, "round {round}\n{found:?}\n{expected:?}");
    }
}

/// Changes a header in one of the ways in which headers go wrong, or are made to.
fn mutate(random: &mut Random, header: &mut Vec<u8>) {
    const TOKENS: [&[u8]; 24] = [
        b"\"",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b" ",
        b"0",
        b"-1",
        b"1e3",
        b"1.0",
        b"null",
        b"18446744073709551615",
        b"18446744073709551616",
        b"\"F32\"",
        b"\"F4\"",
        b"\"BOOL\"",
        b"\\u0061",
        b"\\ud800",
        b"\"__metadata__\":{\"a\":\"b\"},",
        b"\"shape\":[1],",
        b"\xff",
        b"\0",
    ];
    let at = random.below(header.len());
    let upto = (at + 1 + random.below(12)).min(header.len());
    match random.below(7) {
        0 => header[at] = random.next() as u8,
        1 => header[at] ^= 1 << random.below(8),
        2 => drop(header.drain(at..upto)),
        3 => {
            let token = *random.pick(&TOKENS);
            drop(header.splice(at..at, token.iter().copied()));
        }
        4 => {
            let token = *random.pick(&TOKENS);
            drop(header.splice(at..upto, token.iter().copied()));
        }
        5 => {
            let piece = header[at..upto].to_vec();
            let target = random.below(header.len());
            drop(header.splice(target..target, piece));
        }
        _ => {
            // Another digit in the place of one: lengths, offsets and dtypes that do not fit.
            let digits: Vec<usize> =
                (0..header.len()).filter(|&at| header[at].is_ascii_digit()).collect();
            if !digits.is_empty() {
                header[*random.pick(&digits)] = b'0' + random.below(10) as u8;
            }
        }
    }
}

/// F1, F2, F6: no header makes the parser panic, and what it accepts the crate accepts and reads
/// alike. (The converse does not hold: the crate accepts duplicate keys of the metadata.)
#[test]
fn corrupted_headers() {
    let mut random = Random(4);
    let (mut accepted, mut refused) = (0, 0);
    for _ in 0..20_000 {
        let tensors = random_tensors(&mut random);
        let metadata = [("format".to_owned(), "pt".to_owned())];
        let file = our_file(tensors, &metadata[..random.below(2)]);
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let mut header = file[8..8 + length].to_vec();
        for _ in 0..1 + random.below(2) {
            if !header.is_empty() {
                mutate(&mut random, &mut header);
            }
        }
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(&header);
        bytes.extend_from_slice(&file[8 + length..]);
        if random.below(10) == 0 {
            bytes.truncate((8 + header.len()).max(bytes.len() - random.below(9)));
        }
        let Some(content) = ours(&bytes) else {
            refused += 1;
            continue;
        };
        accepted += 1;
        let text = String::from_utf8_lossy(&header);
        assert_eq!(theirs(&bytes).ok(), Some(content), "{text}");
    }
    assert!(accepted > 500 && refused > 5000, "{accepted} accepted, {refused} refused");
}
