// Asks a real llama.cpp about GGUF files. By hand: node tests/llama_cpp.mjs RESULT.json < request.json
//
// request: {"models": [path], "texts": [string], "prompts": [[token]], "steps": number, "query": string}
// result:  one for each model: {"tokens": of each text, "greedy": the tokens after each prompt,
//          "wrapper", "chat": the prompt that node-llama-cpp, and so QMD, makes of the query}
import fs from "node:fs";
import {getLlama, LlamaLogLevel, resolveChatWrapper} from "node-llama-cpp";

const {models, texts, prompts, steps, query} = JSON.parse(fs.readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, logLevel: LlamaLogLevel.error});

function chatPrompt(model, wrapper) {
    const chatHistory = [
        ...wrapper.generateInitialChatHistory(),
        {type: "user", text: query},
        {type: "model", response: []}
    ];
    const {contextText} = wrapper.generateContextState({chatHistory});
    return model.detokenize(contextText.tokenize(model.tokenizer), true);
}

async function greedyTokens(sequence, prompt) {
    await sequence.clearHistory();
    const found = [];
    let input = prompt;
    while (found.length < steps) {
        const choose = {generateNext: {token: true, options: {temperature: 0}}};
        const output = await sequence.controlledEvaluate([...input.slice(0, -1), [input.at(-1), choose]]);
        const {token} = output.at(-1).next;
        found.push(token);
        input = [token];
    }
    return found;
}

const results = [];
for (const modelPath of models) {
    const model = await llama.loadModel({modelPath});
    // One thread: several of them wait for each other on a busy machine.
    const context = await model.createContext({contextSize: 512, threads: 1});
    const sequence = context.getSequence();
    const greedy = [];
    for (const prompt of prompts)
        greedy.push(await greedyTokens(sequence, prompt));
    const wrapper = resolveChatWrapper(model);
    const tokens = texts.map((text) => model.tokenize(text, true));
    results.push({tokens, greedy, wrapper: wrapper.wrapperName, chat: chatPrompt(model, wrapper)});
    await model.dispose();
}

// To a file: a pipe is cut at 64 KB when the process exits.
fs.writeFileSync(process.argv[2], JSON.stringify(results));
process.exit(0);
