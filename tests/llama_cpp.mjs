// Runs GGUF files in a real llama.cpp: node tests/llama_cpp.mjs RESULT.json < request.json
//
// request: {"models": [path], "texts": [string], "prompts": [[token]], "steps": number,
//           "query": string, or null to skip "wrapper" and "chat", which take seconds}
// result:  one object per model: {"tokens": tokens of each text, "greedy": tokens after each prompt,
//          "confidence": the probability of each of them,
//          "wrapper": node-llama-cpp's chat wrapper, "chat": the prompt it makes of the query, as in QMD}
import fs from "node:fs";
import {getLlama, LlamaLogLevel, resolveChatWrapper} from "node-llama-cpp";

const {models, texts, prompts, steps, query} = JSON.parse(fs.readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, logLevel: LlamaLogLevel.error});

function chatPrompt(model) {
    if (query === null)
        return {};
    const wrapper = resolveChatWrapper(model);
    const chatHistory = [
        ...wrapper.generateInitialChatHistory(),
        {type: "user", text: query},
        {type: "model", response: []}
    ];
    const {contextText} = wrapper.generateContextState({chatHistory});
    const chat = model.detokenize(contextText.tokenize(model.tokenizer), true);
    return {wrapper: wrapper.wrapperName, chat};
}

async function greedyTokens(sequence, prompt) {
    await sequence.clearHistory();
    const found = [], confidences = [];
    let input = prompt;
    while (found.length < steps) {
        const choose = {generateNext: {token: true, confidence: true, options: {temperature: 0}}};
        const output = await sequence.controlledEvaluate([...input.slice(0, -1), [input.at(-1), choose]]);
        const {token, confidence} = output.at(-1).next;
        found.push(token);
        confidences.push(confidence);
        input = [token];
    }
    return [found, confidences];
}

const results = [];
for (const modelPath of models) {
    const model = await llama.loadModel({modelPath});
    // One thread: on a busy machine several would wait for each other.
    const context = await model.createContext({contextSize: 512, threads: 1});
    const sequence = context.getSequence();
    const greedy = [], confidence = [];
    for (const prompt of prompts) {
        const [found, confidences] = await greedyTokens(sequence, prompt);
        greedy.push(found);
        confidence.push(confidences);
    }
    const tokens = texts.map((text) => model.tokenize(text, true));
    results.push({tokens, greedy, confidence, ...chatPrompt(model)});
    await model.dispose();
}

// To a file, because a pipe is cut at 64 KB when the process exits.
fs.writeFileSync(process.argv[2], JSON.stringify(results));
process.exit(0);
